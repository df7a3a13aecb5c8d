import Host

// What a vCPU's access does that left the guest: no slot showed memory there, or not for writing.

extension GuestMemory {
    /// What the guest reads, 1 to 8 bytes, little-endian: memory, a device's answer, or all ones where nothing answers. Waits for a commit
    /// that is just changing what lies there.
    public func guestRead(_ address: GuestPhysicalAddress, byteCount: Int) -> UInt64 {
        var value: UInt64 = 0
        forEachPart(of: address, byteCount) { section, offset, done, count in
            let part: UInt64 =
                switch section?.content {
                case .memory(let block, let start): Self.load(block, Int(start.value + offset), count)
                case .device(let device, let start): device.memoryRead(offset: start + offset, size: count)
                case nil: .max
                }
            value |= (count < 8 ? part & (1 << UInt64(count * 8) - 1) : part) << UInt64(done * 8)
        }
        return value
    }

    /// What the guest writes, 1 to 8 bytes, goes to memory, to a device, or nowhere. Waits as `guestRead` does.
    public func guestWrite(_ address: GuestPhysicalAddress, byteCount: Int, value: UInt64) {
        forEachPart(of: address, byteCount) { section, offset, done, count in
            guard let section, !section.isReadOnly else { return }
            let part = value >> UInt64(done * 8)
            switch section.content {
            case .memory(let block, let start):
                Self.store(part, block, Int(start.value + offset), count)
                hostWrites.record(block, offset: Int(start.value + offset), count: count)
            case .device(let device, let start): device.memoryWrite(offset: start + offset, size: count, value: part)
            }
        }
    }

    /// An access goes in parts where it crosses from one section to another. The body gets the section, the part's offset in it, the bytes
    /// done before, and the part's own.
    private func forEachPart(
        of address: GuestPhysicalAddress, _ byteCount: Int, _ body: (FlatSection?, UInt64, Int, Int) -> Void
    ) {
        var done = 0
        while done < byteCount {
            let position = GuestPhysicalAddress(address.value &+ UInt64(done))
            let view = settle(position)
            let section = view.section(at: position)
            let limit = section?.end ?? view.nextSection(after: position)
            let left = UInt64(byteCount - done)
            let count = Int(min(left, limit.map { $0.value - position.value } ?? left))
            body(section, section.map { position.value - $0.guestAddress.value } ?? 0, done, count)
            done += count
        }
    }

    /// Whole words are loaded and stored at once: another vCPU never sees half of one.
    private static func load(_ block: RAMBlock, _ offset: Int, _ count: Int) -> UInt64 {
        guard offset % count == 0 else { return bytes(block, offset, count) }
        switch count {
        case 1: return UInt64(block.mapping.load(at: offset, as: UInt8.self))
        case 2: return UInt64(block.mapping.load(at: offset, as: UInt16.self))
        case 4: return UInt64(block.mapping.load(at: offset, as: UInt32.self))
        case 8: return block.mapping.load(at: offset, as: UInt64.self)
        default: return bytes(block, offset, count)
        }
    }

    private static func bytes(_ block: RAMBlock, _ offset: Int, _ count: Int) -> UInt64 {
        block.mapping.read(at: offset, count: count).reversed().reduce(0) { $0 << 8 | UInt64($1) }
    }

    private static func store(_ value: UInt64, _ block: RAMBlock, _ offset: Int, _ count: Int) {
        switch offset % count == 0 ? count : 0 {
        case 1: block.mapping.store(UInt8(truncatingIfNeeded: value), at: offset)
        case 2: block.mapping.store(UInt16(truncatingIfNeeded: value), at: offset)
        case 4: block.mapping.store(UInt32(truncatingIfNeeded: value), at: offset)
        case 8: block.mapping.store(value, at: offset)
        default:
            block.mapping.write((0..<count).map { UInt8(truncatingIfNeeded: value >> UInt64($0 * 8)) }, at: offset)
        }
    }
}
