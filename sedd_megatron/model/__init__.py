"""The score network as Megatron-Core modules."""
