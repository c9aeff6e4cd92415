"""A backend that is found by its name and compiles nothing."""
