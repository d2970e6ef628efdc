"""Parts of the recipes that learn to write text from text: `data_to_text`, `maths`, `methods`."""
