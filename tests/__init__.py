"""The tests of contrast; they mirror the package."""
