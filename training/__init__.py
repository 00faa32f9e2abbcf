"""How assistants are made: `python -m training.distill` for any LLM; and how the pair in pair/ was.

Text -> words, recall -> data -> loop, with the loss of distill (on align) or of pretrain -> a checkpoint folder.
"""
