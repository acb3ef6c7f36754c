"""An executor of PTX on the CPU: what it runs, and what it cannot show, stands in README.md beside this."""
