"""Problems with closed forms."""
