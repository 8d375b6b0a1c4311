"""A guest that says hello on the serial port, and the monitor that runs it."""

from pykvm.client import Hlt, Io, Kvm

# mov $text, %si; mov $0x3f8, %dx; 1: lodsb; test %al, %al; je 2f; out %al, %dx; jmp 1b; 2: hlt
CODE = bytes.fromhex("be1010 baf803 ac 84c0 7403 ee ebf8 f4")

with Kvm() as kvm, kvm.create_vm() as vm:
    memory = vm.add_memory(0x1000, 0x1000)
    memory[: len(CODE)] = CODE
    memory[0x10:0x17] = b"hello\n\0"
    vcpu = vm.create_vcpu(0)
    with vcpu.sregs as sregs:
        sregs.cs.base = sregs.cs.selector = 0
    vcpu.regs.rip = 0x1000
    while True:
        match vcpu.run():
            case Io(out=True, port=0x3F8, data=data):
                print(bytes(data).decode(), end="")
            case Hlt():
                break
