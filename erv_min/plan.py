"""tmp"""
class Live: pass
