import Host

/// The functions of zstd that are used, as `zstd.h` declares them (stable since 1.4).
@safe struct ZstdLibrary {
    typealias Context = UnsafeMutableRawPointer
    typealias Make = @convention(c) () -> Context?
    typealias Free = @convention(c) (Context) -> UInt
    typealias Set = @convention(c) (Context, CInt, CInt) -> UInt
    typealias Reset = @convention(c) (Context, CInt) -> UInt
    typealias Compress = @convention(c) (Context, UnsafeMutableRawPointer, UnsafeMutableRawPointer, CInt) -> UInt
    typealias Decompress = @convention(c) (Context, UnsafeMutableRawPointer, UnsafeMutableRawPointer) -> UInt

    let makeCompressor: Make
    let freeCompressor: Free
    let setCompressor: Set
    let resetCompressor: Reset
    let compress: Compress
    let makeDecompressor: Make
    let freeDecompressor: Free
    let setDecompressor: Set
    let resetDecompressor: Reset
    let decompress: Decompress
    let isError: @convention(c) (UInt) -> CUnsignedInt
    let errorName: @convention(c) (UInt) -> UnsafePointer<CChar>

    init(_ names: [String] = ["libzstd.so.1", "libzstd.so"]) throws(CompressionError) {
        do throws(DynamicLibraryError) {
            let library = try DynamicLibrary(
                names,
                remedy: "install zstd's library (Debian: libzstd1), or choose another multifd-compression")
            // SAFETY: the types are those of zstd.h; enumerations are ints there.
            unsafe makeCompressor = try library.function("ZSTD_createCCtx", as: Make.self)
            unsafe freeCompressor = try library.function("ZSTD_freeCCtx", as: Free.self)
            unsafe setCompressor = try library.function("ZSTD_CCtx_setParameter", as: Set.self)
            unsafe resetCompressor = try library.function("ZSTD_CCtx_reset", as: Reset.self)
            unsafe compress = try library.function("ZSTD_compressStream2", as: Compress.self)
            unsafe makeDecompressor = try library.function("ZSTD_createDCtx", as: Make.self)
            unsafe freeDecompressor = try library.function("ZSTD_freeDCtx", as: Free.self)
            unsafe setDecompressor = try library.function("ZSTD_DCtx_setParameter", as: Set.self)
            unsafe resetDecompressor = try library.function("ZSTD_DCtx_reset", as: Reset.self)
            unsafe decompress = try library.function("ZSTD_decompressStream", as: Decompress.self)
            unsafe isError = try library.function("ZSTD_isError", as: (@convention(c) (UInt) -> CUnsignedInt).self)
            unsafe errorName = try library.function(
                "ZSTD_getErrorName", as: (@convention(c) (UInt) -> UnsafePointer<CChar>).self)
        } catch { throw .library(error) }
    }
}

/// A zstd frame that is written or read over a whole migration.
@safe final class ZstdStream: CompressionStream {
    enum Direction: Equatable {
        case compress(level: Int)
        case decompress
    }

    /// ZSTD_inBuffer and ZSTD_outBuffer.
    private struct Buffer {
        var address: UInt
        var size: UInt
        var position: UInt = 0
    }

    // Numbers of zstd.h.
    private static let levelParameter: CInt = 100
    private static let largestWindowParameter: CInt = 100
    private static let goOn: CInt = 0
    private static let flushNow: CInt = 1
    private static let sessionOnly: CInt = 1
    /// 32 MiB, the window of level 20: a peer that asks for more is refused.
    private static let largestWindowBits: CInt = 25

    let method = CompressionMethod.zstd
    /// Without its "stable buffer" options, and as long as it is never told that the frame ends, zstd copies all it takes into a window
    /// of its own and reads that.
    let readsOnce = true
    private let library: ZstdLibrary
    private let direction: Direction
    /// SAFETY: made in `init`, freed in `deinit`.
    private let context: UnsafeMutableRawPointer

    init(_ library: ZstdLibrary, _ direction: Direction) throws(CompressionError) {
        let made = unsafe direction == .decompress ? library.makeDecompressor() : library.makeCompressor()
        guard let context = unsafe made else {
            throw .failed(.zstd, operation: "starting", reason: "out of memory")
        }
        self.library = library
        self.direction = direction
        unsafe self.context = context
        let status =
            switch direction {
            case .compress(let level): unsafe library.setCompressor(context, Self.levelParameter, CInt(level))
            case .decompress:
                unsafe library.setDecompressor(context, Self.largestWindowParameter, Self.largestWindowBits)
            }
        if let reason = reason(status) { throw .failed(.zstd, operation: "starting", reason: reason) }
    }

    deinit {
        _ = unsafe direction == .decompress ? library.freeDecompressor(context) : library.freeCompressor(context)
    }

    func run(
        _ source: UnsafeRawBufferPointer, into room: UnsafeMutableRawBufferPointer, flush: Bool
    ) throws(CompressionError) -> StreamStep {
        var from = Buffer(address: UInt(bitPattern: source.baseAddress), size: UInt(source.count))
        var to = Buffer(address: UInt(bitPattern: room.baseAddress), size: UInt(room.count))
        // SAFETY: three words each, as in zstd.h; zstd keeps to the sizes and, without its "stable buffer" options, keeps no pointer.
        let status = unsafe withUnsafeMutablePointer(to: &from) { from in
            unsafe withUnsafeMutablePointer(to: &to) { to in
                unsafe direction == .decompress
                    ? library.decompress(context, to, from)
                    : library.compress(context, to, from, flush ? Self.flushNow : Self.goOn)
            }
        }
        if let reason = reason(status) {
            throw direction == .decompress
                ? .damaged(.zstd, reason: reason) : .failed(.zstd, operation: "compressing", reason: reason)
        }
        return StreamStep(taken: Int(from.position), put: Int(to.position), isFlushed: status == 0)
    }

    func reset() throws(CompressionError) {
        let status =
            unsafe direction == .decompress
            ? library.resetDecompressor(context, Self.sessionOnly) : library.resetCompressor(context, Self.sessionOnly)
        if let reason = reason(status) { throw .failed(.zstd, operation: "starting again", reason: reason) }
    }

    /// The library's words for a status that is an error.
    private func reason(_ status: UInt) -> String? {
        guard library.isError(status) != 0 else { return nil }
        return unsafe String(cString: library.errorName(status)).lowercased()
    }
}
