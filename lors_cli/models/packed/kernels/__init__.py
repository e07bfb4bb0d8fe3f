"""Products with packed weights, in C where the machine has a compiler."""
