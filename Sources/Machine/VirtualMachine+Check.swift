public import GuestMemory
public import GuestPrograms
import Host

// The built-in guests know what their memory must hold: a machine can check it from inside, without a copy.

extension GuestMemory {
    /// Reads guest memory for the checker and status of a built-in guest. Holes read as zeroes and stay holes.
    public var guestReader: GuestMemoryReader {
        { (address, buffer) throws(GuestProgramError) in
            var filled = 0
            do {
                try self.forEachPiece(
                    at: GuestPhysicalAddress(address), byteCount: UInt64(buffer.count),
                    { (block, offset, count) throws in
                        // SAFETY: pieces add up to the buffer's count, so each lies inside it.
                        try unsafe block.copy(
                            at: offset,
                            into: UnsafeMutableRawBufferPointer(rebasing: buffer[filled..<filled + count])
                        )
                        filled += count
                    }, orThrow: { $0 })
            } catch {
                throw .unreadable(physicalAddress: address, reason: "\(error)")
            }
        }
    }
}

extension VirtualMachine {
    /// Checks the memory of a built-in guest, page by page; a running guest stands still meanwhile.
    ///
    /// - Throws: `GuestProgramError` when no built-in guest runs here.
    public func checkGuest() throws(GuestProgramError) -> GuestCheck {
        try whileStopped { () throws(GuestProgramError) in try unsafe GuestChecker(read: memory.guestReader).check() }
    }

    /// How far a built-in guest has come.
    public func guestStatus() throws(GuestProgramError) -> GuestStatus {
        try unsafe GuestStatus(read: memory.guestReader)
    }

    /// How long the accesses took that a guest `probe` timed so far.
    ///
    /// - Throws: `GuestProgramError` when no such guest runs here.
    public func guestHistogram() throws(GuestProgramError) -> GuestHistogram {
        try unsafe GuestHistogram(read: memory.guestReader)
    }

    /// Has a built-in guest measure its longest gap afresh (`GuestStatus.CPU.longestGapTicks`). A running guest may just then store a
    /// gap it found before: then that one stays.
    ///
    /// - Throws: `GuestProgramError` when no built-in guest runs here.
    public func resetGuestGaps() throws(GuestProgramError) {
        for address in try guestStatus().gapAddresses {
            do {
                try memory.write([UInt8](repeating: 0, count: 8), at: GuestPhysicalAddress(address))
            } catch { throw .unreadable(physicalAddress: address, reason: "\(error)") }
        }
    }
}
