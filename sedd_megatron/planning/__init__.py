"""Which layouts a run may take on a cluster, what each needs of memory and how long it takes; starts nothing."""
