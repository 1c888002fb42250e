"""The passes over the layers: the only room that runs them."""
