"""Parts of the recipes `image_captioning`, `audio_captioning` and `translation`."""
