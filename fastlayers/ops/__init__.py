"""What is computed, saved and supported: a file per family, with a record and a function per operation."""
