import CLinux
import Glibc

// How a fault ends: a page is put where it is missing, and whoever sleeps there goes on. A page is never overwritten: one that is
// there already stays, as when it came twice, and whoever waits for it is woken all the same.
// Each range belongs to the userfaultfd that it was registered with: another one can place pages there, too, but wakes nobody.

extension UserFault {
    /// Copies bytes of another mapping into missing pages.
    ///
    /// - Parameters:
    ///   - pageBytes: the size of the target's pages; `range` is a multiple of it.
    ///   - wakes: whoever sleeps there goes on; else ``wake(_:_:)`` must follow.
    /// - Returns: the bytes that were placed; the others were there before.
    @discardableResult
    public func copy(
        _ source: Mapping, at offset: Int, into target: Mapping, _ range: Range<Int>, pageBytes: Int = 4096,
        wakes: Bool = true
    ) throws(SystemError) -> Int {
        source.check(offset, range.count)
        // SAFETY: the source is checked just now and outlives the call.
        return try unsafe copy(
            source.base + offset, into: target, range, pageBytes: pageBytes, wakes: wakes)
    }

    /// The same from memory of the caller's, as many bytes as the range has.
    @unsafe @discardableResult
    public func copy(
        _ bytes: UnsafeRawPointer, into target: Mapping, _ range: Range<Int>, pageBytes: Int = 4096, wakes: Bool = true
    ) throws(SystemError) -> Int {
        try place(target, range, pageBytes: pageBytes, "UFFDIO_COPY") { descriptor, place, done in
            var request = uffdio_copy()
            request.dst = place.start
            request.src = UInt64(UInt(bitPattern: bytes)) + UInt64(done)
            request.len = place.len
            request.mode = wakes ? 0 : Self.doNotWake
            let status = unsafe gw_uffd_copy(descriptor, &request)
            return (status, request.copy)
        }
    }

    /// Has private pages of another mapping change their place to missing ones: nothing is copied, and a huge page stays one. What was
    /// moved reads as zeroes where it was. Needs ``Features/move``.
    ///
    /// - Returns: the bytes that moved, from the range's start on; fewer than it has where the kernel would not: those are where they were.
    public func move(_ source: Mapping, at offset: Int, into target: Mapping, _ range: Range<Int>) -> Int {
        source.check(offset, range.count)
        let place = Self.place(target, range)
        var moved = 0
        while moved < range.count {
            var request = gw_uffd_move_request()
            request.dst = place.start + UInt64(moved)
            request.src = UInt64(source.hostAddress(at: offset + moved))
            request.len = UInt64(range.count - moved)
            let status = unsafe gw_uffd_move(descriptor.number, &request)
            if status == 0 { return range.count }
            moved += Int(max(0, request.moved))
            // The layout of the address space was just being changed, or the page was looked at: another call goes on from there.
            guard status == -EAGAIN else { break }
        }
        return moved
    }

    /// Puts zeroes into missing pages: the kernel's common zero page, which costs no memory until it is written.
    /// - Returns: as ``copy(_:at:into:_:pageBytes:wakes:)``.
    @discardableResult
    public func zero(_ target: Mapping, _ range: Range<Int>, wakes: Bool = true) throws(SystemError) -> Int {
        try place(target, range, pageBytes: 4096, "UFFDIO_ZEROPAGE") { descriptor, place, _ in
            var request = uffdio_zeropage()
            request.range = place
            request.mode = wakes ? 0 : Self.doNotWake
            let status = unsafe gw_uffd_zeropage(descriptor, &request)
            return (status, request.zeropage)
        }
    }

    /// Maps pages that the file behind the range has: filled through another mapping of it (a minor fault ends so).
    /// - Returns: the bytes that were mapped; the others were mapped before.
    /// - Throws: `SystemError`, EFAULT where the file has no page.
    @discardableResult
    public func mapExisting(
        _ target: Mapping, _ range: Range<Int>, pageBytes: Int = 4096, wakes: Bool = true
    ) throws(SystemError) -> Int {
        try place(target, range, pageBytes: pageBytes, "UFFDIO_CONTINUE") { descriptor, place, _ in
            var request = uffdio_continue()
            request.range = place
            request.mode = wakes ? 0 : Self.doNotWake
            let status = unsafe gw_uffd_continue(descriptor, &request)
            return (status, request.mapped)
        }
    }

    /// Whoever sleeps in the range tries again.
    public func wake(_ mapping: Mapping, _ range: Range<Int>) throws(SystemError) {
        var place = Self.place(mapping, range)
        try checked(unsafe gw_uffd_wake(descriptor.number, &place), "UFFDIO_WAKE", Self.words(range))
    }

    /// From now on who writes to pages of the range that are there sleeps; reading goes on. The range is registered for it.
    public func protect(_ mapping: Mapping, _ range: Range<Int>) throws(SystemError) {
        try protect(mapping, range, mode: 1)
    }

    /// The contrary; who sleeps there goes on.
    public func unprotect(_ mapping: Mapping, _ range: Range<Int>) throws(SystemError) {
        try protect(mapping, range, mode: 0)
    }

    private func protect(_ mapping: Mapping, _ range: Range<Int>, mode: UInt64) throws(SystemError) {
        var request = uffdio_writeprotect()
        request.range = Self.place(mapping, range)
        request.mode = mode
        var status: CInt = 0
        // The layout of the address space may just be changing.
        repeat { status = unsafe gw_uffd_write_protect(descriptor.number, &request) } while status == -EAGAIN
        try checked(status, "UFFDIO_WRITEPROTECT", Self.words(range))
    }

    /// The same for address space that need not be registered, nor be a ``Mapping``'s.
    public func wake(_ addresses: Range<UInt>) throws(SystemError) {
        var place = Self.place(addresses)
        try checked(
            unsafe gw_uffd_wake(descriptor.number, &place), "UFFDIO_WAKE", "\(addresses.count) bytes of a window")
    }

    private static let doNotWake: UInt64 = 1

    /// Calls `attempt` until all of the range is there. It returns the status, and the bytes done or, of none, -errno.
    private func place(
        _ target: Mapping, _ range: Range<Int>, pageBytes: Int, _ operation: String,
        _ attempt: (CInt, uffdio_range, Int) -> (CInt, Int64)
    ) throws(SystemError) -> Int {
        let whole = Self.place(target, range)
        var done = 0
        var placed = 0
        while done < range.count {
            let rest = uffdio_range(start: whole.start + UInt64(done), len: UInt64(range.count - done))
            let (status, count) = attempt(descriptor.number, rest, done)
            switch -status {
            case 0:
                return placed + range.count - done
            // The kernel stopped on its way: the layout of the address space is just being changed. Another call goes on from there.
            case EAGAIN:
                let step = Int(max(0, count))
                done += step
                placed += step
            case EEXIST:
                let present = range.lowerBound + done..<min(range.lowerBound + done + pageBytes, range.upperBound)
                try wake(target, present)
                done += pageBytes
            default:
                let remedy = -status == ENOSPC || -status == ENOMEM ? "the host has no memory left for it" : nil
                throw SystemError(
                    operation, Self.words(range.lowerBound + done..<range.upperBound), code: -status, remedy: remedy)
            }
        }
        return placed
    }
}
