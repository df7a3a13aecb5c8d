import Glibc

// A file read and written at given places, by several threads at once; the file's own position does not move.

extension Descriptor {
    /// Writes all of the vector at `offset`, and leaves it empty. - Throws: `SystemError`, `ENOSPC` among them.
    public func writeAll(_ vector: inout IOVector, at offset: UInt64) throws(SystemError) {
        var place = try Self.place(offset, "write", name)
        while vector.byteCount > 0 {
            let count = unsafe vector.withEntries { unsafe pwritev(number, $0, $1, place) }
            guard count > 0 else {
                if count < 0, errno == EINTR { continue }
                throw count == 0 ? SystemError("write", name, code: EIO) : .last("write", name)
            }
            vector.advance(by: count)
            place += count
        }
    }

    /// Fills all of the vector from `offset` on. - Throws: `SystemError`; `ENODATA` where the file ends before.
    public func readAll(_ vector: inout IOVector, at offset: UInt64) throws(SystemError) {
        var place = try Self.place(offset, "read", name)
        while vector.byteCount > 0 {
            let count = unsafe vector.withEntries { unsafe preadv(number, $0, $1, place) }
            guard count > 0 else {
                if count < 0, errno == EINTR { continue }
                throw count == 0
                    ? SystemError("read", name, code: ENODATA, remedy: "the file ends too early")
                    : .last("read", name)
            }
            vector.advance(by: count)
            place += count
        }
    }

    /// Writes all bytes at `offset`.
    public func writeAll(_ bytes: [UInt8], at offset: UInt64) throws(SystemError) {
        var place = try Self.place(offset, "write", name)
        var rest = bytes[...]
        while !rest.isEmpty {
            // SAFETY: the buffer is the slice's own storage, for the time of the call.
            let count = unsafe rest.withUnsafeBytes { unsafe pwrite(number, $0.baseAddress!, $0.count, place) }
            guard count > 0 else {
                if count < 0, errno == EINTR { continue }
                throw count == 0 ? SystemError("write", name, code: EIO) : .last("write", name)
            }
            rest = rest.dropFirst(count)
            place += count
        }
    }

    /// `count` bytes from `offset` on. - Throws: `SystemError`; `ENODATA` where the file ends before.
    public func read(at offset: UInt64, count: Int) throws(SystemError) -> [UInt8] {
        let start = try Self.place(offset, "read", name)
        var bytes = [UInt8](repeating: 0, count: count)
        var done = 0
        while done < count {
            // SAFETY: the rest of the array's own storage, for the time of the call.
            let got = unsafe bytes.withUnsafeMutableBytes {
                unsafe pread(number, $0.baseAddress! + done, count - done, start + done)
            }
            guard got > 0 else {
                if got < 0, errno == EINTR { continue }
                throw got == 0
                    ? SystemError("read", name, code: ENODATA, remedy: "the file ends too early") : .last("read", name)
            }
            done += got
        }
        return bytes
    }

    private static func place(_ offset: UInt64, _ operation: String, _ name: String) throws(SystemError) -> Int {
        guard let place = Int(exactly: offset) else { throw SystemError(operation, name, code: EOVERFLOW) }
        return place
    }

    /// Where the file's position is, bytes from its start.
    public func position() throws(SystemError) -> UInt64 {
        let position = lseek(number, 0, SEEK_CUR)
        guard position >= 0 else { throw .last("lseek", name) }
        return UInt64(position)
    }

    /// Returns when what was written is on the disk (fdatasync).
    public func synchronize() throws(SystemError) {
        guard fdatasync(number) == 0 else { throw .last("fdatasync", name) }
    }
}

extension Mapping {
    /// Shows `count` bytes of a file from `fileOffset` on in place of what is at `offset`: read at first touch; what is written stays
    /// here, and the file is never changed. All in whole pages. For private memory only; the file must not shrink as long as it is used.
    public func show(_ file: Descriptor, fileOffset: UInt64, at offset: Int, count: Int) throws(SystemError) {
        check(offset, count)
        guard let place = Int(exactly: fileOffset) else { throw SystemError("mmap", file.name, code: EOVERFLOW) }
        // SAFETY: the range lies inside this mapping, which stays as long; its pages are replaced in one step, and nobody holds
        // references into it, only offsets.
        let address = unsafe mmap(
            base + offset, count, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED | MAP_NORESERVE, file.number, place)
        guard unsafe address != MAP_FAILED else { throw .last("mmap", file.name) }
        _ = unsafe madvise(base + offset, count, CInt(MADV_DONTDUMP))
    }
}
