def chat() -> int:
    return 0
