// The Devices room: what a guest finds behind I/O ports, and the BIOS calls of a boot sector.
//
//   PortBus              (port, size) -> device, or all-ones where nobody answers
//   PortDevice           the contract of everything on the bus; MigratableDevice is its part about migration
//     UART16550            0x3f8-0x3ff  COM1; UARTRegisters is its register file, without locks or callbacks
//     SystemControlPortA   0x92         A20 bit, fast reset
//     KeyboardController   0x60, 0x64   i8042 without keys: reset and A20
//     DebugExit            0xf4         leaves the VMM with a status chosen by the guest
//     DebugConsole         0xe9         one byte out, no handshake
//   BIOSServices         INT 10h to 1Ah for real-mode guests, entered through BIOSImage's stubs; reads BootDisk
//
// Nothing here knows KVM or has a thread: the Machine room gives every device closures for what leaves it (bytes,
// interrupt levels, reset requests) and calls it from vCPU threads. State travels as one section per device, written
// by StateWriter and read by StateReader: big-endian, fixed length unless the device says otherwise.
