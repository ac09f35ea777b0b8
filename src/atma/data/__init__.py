"""From text to batches: sources → documents → token shards → rows.

`sources` reads documents, `prepare` tokenises them, `split` holds some out, `shards` is one file of tokens, `dataset` a
folder of them, `batches` draws training rows from it and `recall` writes the synthetic ones.
"""
