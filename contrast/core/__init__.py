"""The foundation of the loss library: embeddings with identities, pairs, and the reductions that losses are made of."""
