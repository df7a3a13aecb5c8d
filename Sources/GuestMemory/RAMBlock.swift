public import Host

/// One block of guest RAM: a memory file and its mapping. The migration stream names it; guest-physical ranges show parts of it.
public final class RAMBlock: Sendable {
    /// The name by which both sides of a migration know the block, 1 to 255 bytes.
    public let name: String
    public let byteCount: UInt64
    public let file: MemoryFile
    public let mapping: Mapping

    /// Allocates a block of holes. - Throws: `SystemError` when the host has no address space or descriptor left.
    public init(name: String, byteCount: UInt64) throws(SystemError) {
        precondition(byteCount > 0 && byteCount % GuestPage.byteCount == 0, "whole pages")
        self.name = name
        self.byteCount = byteCount
        file = try MemoryFile(name: "godwit-\(name)", byteCount: byteCount)
        mapping = try Mapping(file.descriptor, byteCount: Int(byteCount))
        try mapping.advise(.dontDump)
    }

    /// Copies bytes out without touching holes, which read as zeroes.
    @unsafe public func copy(offset: Int, to buffer: UnsafeMutableRawBufferPointer) {
        let end = UInt64(offset + buffer.count)
        var position = UInt64(offset)
        unsafe buffer.initializeMemory(as: UInt8.self, repeating: 0)
        while let data = try? file.nextData(from: position, to: end) {
            unsafe mapping.withBytes(at: Int(data.lowerBound), count: Int(data.upperBound - data.lowerBound)) { source in
                unsafe UnsafeMutableRawBufferPointer(rebasing: buffer[(Int(data.lowerBound) - offset)...]).copyMemory(from: source)
            }
            position = data.upperBound
        }
    }

    public var pageCount: UInt64 { byteCount >> GuestPage.shift }

    /// The next run of allocated pages at or after `page`, before `end`; never-touched pages are not in it.
    public func nextAllocatedRun(from page: PageIndex, to end: PageIndex) throws(SystemError) -> Range<PageIndex>? {
        guard let data = try file.nextData(from: page.offset.value, to: end.offset.value) else { return nil }
        let last = (data.upperBound + GuestPage.byteCount - 1) >> GuestPage.shift
        return RAMOffset(data.lowerBound).page..<PageIndex(last)
    }
}
