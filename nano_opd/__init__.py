"""On-policy distillation from scratch, one concept per file. Start with train.py, then opd.py beside opdplus.py."""
