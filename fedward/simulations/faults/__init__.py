"""The fault laboratory: a whole federation in one process, virtual time, faults from a seed."""
