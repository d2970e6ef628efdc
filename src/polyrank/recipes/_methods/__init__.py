"""An entry of conf/method/: the adapter that it names, its parts, its size at a budget."""
