"""From packed events to fewer packed vectors: embeddings summed, old sessions pooled to one token each."""
