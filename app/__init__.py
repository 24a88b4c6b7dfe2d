"""How is it wired? The MONAI Deploy application; `python app` runs it."""
