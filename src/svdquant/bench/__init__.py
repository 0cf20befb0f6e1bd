"""`svdquant bench`: layers, blocks and pipelines against what else there is, all in one run."""
