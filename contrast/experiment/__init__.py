"""The experiment: its config, its parts, its run and the folder of it."""
