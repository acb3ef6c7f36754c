"""The custom ops, the layouts that they take, and the choice of a backend by device."""
