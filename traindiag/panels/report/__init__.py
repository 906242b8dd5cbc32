"""A report of one or several runs, as a file that opens anywhere."""
