"""The scales at which a linear is solved, and its stored form and report."""
