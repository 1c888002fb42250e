"""A sweep over the sparsity: many prunings of one model, each measured."""
