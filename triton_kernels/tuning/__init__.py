"""`babai tune`: the fastest launch configurations, measured on a GPU."""
