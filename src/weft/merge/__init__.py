"""The merge of an adapter into the weights of its base."""
