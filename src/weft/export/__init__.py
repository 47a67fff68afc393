"""A folder of a model made of a base and an adapter, and the proof that it answers as the two did."""
