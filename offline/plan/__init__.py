"""Where the bits go: how much the loss minds an error, what a linear will cost, the plan."""
