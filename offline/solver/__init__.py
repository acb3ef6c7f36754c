"""Closest-vector problems: factor, nearest plane with one or several paths, the target that drift corrects."""
