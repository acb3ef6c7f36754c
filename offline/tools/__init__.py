"""What one does with a model or checkpoint besides quantizing it: predict, inspect, convert, evaluate."""
