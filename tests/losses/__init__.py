"""The tests of contrast.losses."""
