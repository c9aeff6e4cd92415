"""Names that transformers imports to read files, and does not use for images that are in memory."""

ImageReadMode = decode_image = None
