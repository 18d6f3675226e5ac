"""The k best items of a large catalogue for every user state, without a users x items matrix."""
