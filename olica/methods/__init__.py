"""What is computed of a layer, from its weights and moments: tensors in, tensors out."""
