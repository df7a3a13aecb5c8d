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

    public var pageCount: UInt64 { byteCount >> GuestPage.shift }

    /// The next run of allocated pages at or after `page`, before `end`; never-touched pages are not in it.
    ///
    /// Costs what the holes and the run cost, and nothing for what is behind `end`.
    public func nextAllocatedRun(from page: PageIndex, to end: PageIndex) throws(SystemError) -> Range<PageIndex>? {
        guard page < end, let start = try file.nextData(from: page.offset.value), start < end.offset.value else {
            return nil
        }
        var position = start
        while position < end.offset.value {
            position += UInt64(try mapping.residentPrefix(at: Int(position), count: Int(end.offset.value - position)))
            // What is not resident may be swapped out: then it is no hole.
            guard position < end.offset.value, try file.nextData(from: position) == position else { break }
            position += GuestPage.byteCount
        }
        return RAMOffset(start).page..<RAMOffset(min(position, end.offset.value)).page
    }
}
