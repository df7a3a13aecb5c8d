// INT 13h: drive 80h, read-only, addressed by sector number or by cylinder, head and sector.
extension BIOSServices {
    private static let drive: UInt8 = 0x80

    /// A geometry that every image fits into with one cylinder.
    private enum Geometry {
        static let heads: UInt64 = 16
        static let sectorsPerTrack: UInt64 = 63
        static let cylinders: UInt64 = 1
    }

    private enum Status {
        static let success: UInt8 = 0x00
        static let invalidRequest: UInt8 = 0x01
        static let writeProtected: UInt8 = 0x03
        static let sectorNotFound: UInt8 = 0x04
        static let addressOutOfBounds: UInt8 = 0x09
    }

    func disk(_ registers: inout BIOSRegisters, _ memory: some BIOSMemory) -> Flags {
        let function = registers.ah
        let status: UInt8
        switch function {
        case 0x01: status = bootDisk.lastStatus
        case 0x15: return driveType(&registers)
        case _ where registers.dl != Self.drive || bootDisk.sectorCount == 0: status = Status.invalidRequest
        case 0x00, 0x0c, 0x0d, 0x10, 0x11, 0x47: status = Status.success  // reset, seek, test ready: nothing moves
        case 0x02: status = readByGeometry(&registers, memory)
        case 0x03, 0x05, 0x43: status = Status.writeProtected
        case 0x04: status = sectorsByGeometry(registers) == nil ? Status.sectorNotFound : Status.success
        case 0x08: status = driveParameters(&registers)
        case 0x41: return extensionsPresent(&registers)
        case 0x42: status = transferByAddressPacket(registers, memory, copies: true)
        case 0x44: status = transferByAddressPacket(registers, memory, copies: false)
        case 0x48: status = extendedParameters(registers, memory)
        default: status = Status.invalidRequest
        }
        registers.ah = status
        bootDisk.lastStatus = status
        return Flags(carry: status != Status.success)
    }

    /// The sectors that CH, CL, DH and AL name.
    private func sectorsByGeometry(_ registers: BIOSRegisters) -> ArraySlice<UInt8>? {
        let cylinder = UInt64(registers.ch) | UInt64(registers.cl & 0xc0) << 2
        let head = UInt64(registers.dh)
        let sector = UInt64(registers.cl & 0x3f)
        guard registers.al > 0, 1...Geometry.sectorsPerTrack ~= sector, head < Geometry.heads else { return nil }
        let first = (cylinder * Geometry.heads + head) * Geometry.sectorsPerTrack + sector - 1
        return bootDisk.sectors(from: first, count: Int(registers.al))
    }

    /// AH=02h: to ES:BX. AL returns the number of sectors read: all or none.
    private func readByGeometry(_ registers: inout BIOSRegisters, _ memory: some BIOSMemory) -> UInt8 {
        guard registers.al > 0 else { return Status.invalidRequest }
        guard let data = sectorsByGeometry(registers) else {
            registers.al = 0
            return Status.sectorNotFound
        }
        guard memory.write(data, at: BIOSRegisters.address(registers.es, registers.ebx)) else {
            registers.al = 0
            return Status.addressOutOfBounds
        }
        return Status.success
    }

    /// AH=08h.
    private func driveParameters(_ registers: inout BIOSRegisters) -> UInt8 {
        registers.al = 0
        registers.ch = UInt8(Geometry.cylinders - 1)
        registers.cl = UInt8(Geometry.sectorsPerTrack)
        registers.dh = UInt8(Geometry.heads - 1)
        registers.dl = 1
        return Status.success
    }

    /// AH=15h: the type is returned where other functions have their status.
    private func driveType(_ registers: inout BIOSRegisters) -> Flags {
        let hardDisk: UInt8 = 3
        let sectors = registers.dl == Self.drive ? UInt32(bootDisk.sectorCount) : 0
        registers.ah = sectors > 0 ? hardDisk : 0
        if sectors > 0 {
            registers.cx = UInt16(sectors >> 16)
            registers.dx = UInt16(truncatingIfNeeded: sectors)
        }
        bootDisk.lastStatus = Status.success
        return .success
    }

    /// AH=41h: extensions of version 1.x, of which the extended disk access functions are there.
    private func extensionsPresent(_ registers: inout BIOSRegisters) -> Flags {
        guard registers.bx == 0x55aa else {
            registers.ah = Status.invalidRequest
            bootDisk.lastStatus = Status.invalidRequest
            return .failure
        }
        registers.bx = 0xaa55
        registers.ah = 0x01
        registers.cx = 0x0001
        bootDisk.lastStatus = Status.success
        return .success
    }

    /// AH=42h and 44h: the disk address packet at DS:SI names a count, a buffer and the first sector. On failure the
    /// packet's count becomes 0, the number of sectors transferred.
    private func transferByAddressPacket(
        _ registers: BIOSRegisters, _ memory: some BIOSMemory, copies: Bool
    ) -> UInt8 {
        let packetAddress = BIOSRegisters.address(registers.ds, registers.esi)
        guard let packet = memory.read(at: packetAddress, count: 16), packet.count == 16 else {
            return Status.addressOutOfBounds
        }
        guard packet[0] >= 16 else { return Status.invalidRequest }
        func field(_ range: Range<Int>) -> UInt64 { packet[range].reversed().reduce(0) { $0 << 8 | UInt64($1) } }
        func failed(_ status: UInt8) -> UInt8 {
            _ = memory.write([0, 0], at: packetAddress + 2)
            return status
        }
        guard let data = bootDisk.sectors(from: field(8..<16), count: Int(field(2..<4))) else {
            return failed(Status.sectorNotFound)
        }
        let buffer = BIOSRegisters.address(UInt16(field(6..<8)), UInt32(field(4..<6)))
        guard !copies || data.isEmpty || memory.write(data, at: buffer) else {
            return failed(Status.addressOutOfBounds)
        }
        return Status.success
    }

    /// AH=48h: the 26-byte result buffer at DS:SI, whose first word says how long the caller's is.
    private func extendedParameters(_ registers: BIOSRegisters, _ memory: some BIOSMemory) -> UInt8 {
        let resultBytes: UInt16 = 26
        let address = BIOSRegisters.address(registers.ds, registers.esi)
        guard let size = memory.read(at: address, count: 2), size.count == 2 else { return Status.addressOutOfBounds }
        guard UInt16(size[0]) | UInt16(size[1]) << 8 >= resultBytes else { return Status.invalidRequest }
        var result: [UInt8] = []
        func append(_ value: UInt64, bytes: Int) {
            for index in 0..<bytes { result.append(UInt8(truncatingIfNeeded: value >> UInt64(8 * index))) }
        }
        append(UInt64(resultBytes), bytes: 2)
        append(0x0002, bytes: 2)  // the geometry is valid
        append(Geometry.cylinders, bytes: 4)
        append(Geometry.heads, bytes: 4)
        append(Geometry.sectorsPerTrack, bytes: 4)
        append(UInt64(bootDisk.sectorCount), bytes: 8)
        append(UInt64(BootDisk.sectorBytes), bytes: 2)
        return memory.write(result[...], at: address) ? Status.success : Status.addressOutOfBounds
    }
}
