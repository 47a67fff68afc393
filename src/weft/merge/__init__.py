"""An adapter into the weights of its base."""
