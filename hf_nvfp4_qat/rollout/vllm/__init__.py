"""What knows vLLM: how it is started, loads, computes, answers, and in which versions that is so."""
