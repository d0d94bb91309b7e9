"""Level A of the study: domains that share their steps by construction, and a small model that half knows them."""
