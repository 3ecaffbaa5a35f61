"""Chats about images."""
