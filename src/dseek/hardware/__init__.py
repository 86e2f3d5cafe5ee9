"""What the machine is and what it was measured to do.

`probe` reads what the operating system says, `measure` times the kernels themselves, `store` keeps the result as JSON.
Nothing is looked up by a processor's name: two machines of one name may behave differently, and the plan must know.
"""
