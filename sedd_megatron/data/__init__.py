"""From text to noisy batches: tokenizers, corpora, windows, the noising collator and the loader."""
