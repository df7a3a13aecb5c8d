import GuestPrograms

/// A built-in guest as an ELF file that starts by the PVH protocol, for VMMs that know nothing of our guests.
///
/// A firmware that runs before, such as QEMU's, clears what was loaded below 1 MiB: those segments are loaded above, with a few
/// instructions that copy them to their places. Source: Xen, `docs/misc/pvh.pandoc`; the note `XEN_ELFNOTE_PHYS32_ENTRY` names the entry point.
enum PVHGuestFile {
    private static let headBytes: UInt64 = 64
    private static let programHeadBytes: UInt64 = 56

    private static let lowMemoryEnd: UInt64 = 1 << 20

    /// - Parameter stagingAddress: where segments wait that belong below 1 MiB; behind the guest's memory.
    static func contents(_ image: GuestImage, stagingAddress: UInt64) -> [UInt8] {
        let low = image.segments.filter { $0.physicalAddress < lowMemoryEnd }
        var staged: [UInt8] = []
        var copies: [(from: UInt64, segment: GuestImage.Segment)] = []
        // The copying code takes less than a page.
        for segment in low {
            copies.append((stagingAddress + 4096 + UInt64(staged.count), segment))
            staged += segment.bytes + [UInt8](repeating: 0, count: (4096 - segment.bytes.count % 4096) % 4096)
        }
        let code = copyingCode(copies, entry: image.entryAddress)
        let start = code + [UInt8](repeating: 0, count: 4096 - code.count)
        let high = image.segments.filter { $0.physicalAddress >= lowMemoryEnd }
        return file(
            high.map { ($0.physicalAddress, $0.bytes) } + [(stagingAddress, start + staged)], entry: stagingAddress)
    }

    /// 32-bit code that copies each segment, in words of 4 bytes, and jumps to the guest's entry.
    private static func copyingCode(_ copies: [(from: UInt64, segment: GuestImage.Segment)], entry: UInt64) -> [UInt8] {
        var code: [UInt8] = [0xFC]  // cld
        for (from, segment) in copies {
            code += [0xBE] + little(from, 4)  // mov esi, from
            code += [0xBF] + little(segment.physicalAddress, 4)  // mov edi, to
            code += [0xB9] + little(UInt64((segment.bytes.count + 3) / 4), 4)  // mov ecx, words
            code += [0xF3, 0xA5]  // rep movsd
        }
        return code + [0xB8] + little(entry, 4) + [0xFF, 0xE0]  // mov eax, entry; jmp eax
    }

    private static func file(_ segments: [(address: UInt64, bytes: [UInt8])], entry: UInt64) -> [UInt8] {
        let note = entryNote(UInt32(truncatingIfNeeded: entry))
        let count = segments.count + 1
        let noteOffset = headBytes + UInt64(count) * programHeadBytes
        var heads = programHead(
            type: 4, flags: 4, offset: noteOffset, address: 0, byteCount: UInt64(note.count), alignment: 4)
        var body = note
        for segment in segments {
            // A page's offset in the file is that in memory, as loaders like it.
            let end = noteOffset + UInt64(body.count)
            body += [UInt8](repeating: 0, count: Int((segment.address &- end) % 4096))
            heads += programHead(
                type: 1, flags: 7, offset: noteOffset + UInt64(body.count), address: segment.address,
                byteCount: UInt64(segment.bytes.count), alignment: 4096)
            body += segment.bytes
        }
        return head(entry: entry, segments: count) + heads + body
    }

    private static func head(entry: UInt64, segments: Int) -> [UInt8] {
        // 64 bits, little-endian, version 1; an executable for x86-64.
        var bytes: [UInt8] = [0x7F, 0x45, 0x4C, 0x46, 2, 1, 1] + [UInt8](repeating: 0, count: 9)
        bytes += little(2, 2) + little(62, 2) + little(1, 4) + little(entry, 8) + little(headBytes, 8) + little(0, 8)
        bytes += little(0, 4) + little(headBytes, 2) + little(programHeadBytes, 2) + little(UInt64(segments), 2)
        return bytes + little(64, 2) + little(0, 2) + little(0, 2)
    }

    private static func programHead(
        type: UInt64, flags: UInt64, offset: UInt64, address: UInt64, byteCount: UInt64, alignment: UInt64
    ) -> [UInt8] {
        little(type, 4) + little(flags, 4) + little(offset, 8) + little(address, 8) + little(address, 8)
            + little(byteCount, 8) + little(byteCount, 8) + little(alignment, 8)
    }

    private static func entryNote(_ entry: UInt32) -> [UInt8] {
        little(4, 4) + little(4, 4) + little(18, 4) + Array("Xen\0".utf8) + little(UInt64(entry), 4)
    }

    private static func little(_ value: UInt64, _ byteCount: Int) -> [UInt8] {
        (0..<byteCount).map { UInt8(truncatingIfNeeded: value >> UInt64(8 * $0)) }
    }
}
