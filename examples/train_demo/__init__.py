"""Parts of the demo-model trainer; `train_demo_model.py` beside this folder is the command."""
