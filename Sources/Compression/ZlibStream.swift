import Host

/// The functions of zlib that are used, as `zlib.h` declares them. The stream is `z_stream`, see `ZlibStream`.
@safe struct ZlibLibrary {
    typealias Stream = UnsafeMutableRawPointer
    typealias Step = @convention(c) (Stream, CInt) -> CInt
    typealias Plain = @convention(c) (Stream) -> CInt

    let deflateInit: @convention(c) (Stream, CInt, UnsafePointer<CChar>, CInt) -> CInt
    let inflateInit: @convention(c) (Stream, UnsafePointer<CChar>, CInt) -> CInt
    let deflate: Step
    let inflate: Step
    let deflateReset: Plain
    let inflateReset: Plain
    let deflateEnd: Plain
    let inflateEnd: Plain

    init(_ names: [String] = ["libz.so.1", "libz.so"]) throws(CompressionError) {
        do throws(DynamicLibraryError) {
            let library = try DynamicLibrary(
                names,
                remedy: "install zlib (Debian: zlib1g), or choose another multifd-compression")
            // SAFETY: the types are those of zlib.h; deflateInit and inflateInit are macros around the names with an underscore.
            unsafe deflateInit = try library.function(
                "deflateInit_", as: (@convention(c) (Stream, CInt, UnsafePointer<CChar>, CInt) -> CInt).self)
            unsafe inflateInit = try library.function(
                "inflateInit_", as: (@convention(c) (Stream, UnsafePointer<CChar>, CInt) -> CInt).self)
            unsafe deflate = try library.function("deflate", as: Step.self)
            unsafe inflate = try library.function("inflate", as: Step.self)
            unsafe deflateReset = try library.function("deflateReset", as: Plain.self)
            unsafe inflateReset = try library.function("inflateReset", as: Plain.self)
            unsafe deflateEnd = try library.function("deflateEnd", as: Plain.self)
            unsafe inflateEnd = try library.function("inflateEnd", as: Plain.self)
        } catch { throw .library(error) }
    }
}

/// A deflate or inflate stream.
///
/// `z_stream` is laid out by hand: 112 bytes on every 64-bit Linux. zlib compares this size, and the first digit of the version, with its
/// own before it touches anything.
@safe final class ZlibStream: CompressionStream {
    enum Direction: Equatable {
        case compress(level: Int)
        case decompress
    }

    private enum Field {
        static let nextIn = 0
        static let availableIn = 8
        static let nextOut = 24
        static let availableOut = 32
        static let message = 48
        static let byteCount = 112
    }

    private enum Code {
        static let ok: CInt = 0
        static let streamEnd: CInt = 1
        static let dictionary: CInt = 2
        static let noProgress: CInt = -5
    }

    private static let syncFlush: CInt = 2

    let method = CompressionMethod.zlib
    /// zlib does not promise it, and on some machines does not do it.
    let readsOnce = false
    private let library: ZlibLibrary
    private let direction: Direction
    /// SAFETY: allocated in `init`, freed in `deinit`, `Field.byteCount` bytes.
    private let stream: UnsafeMutableRawPointer

    init(_ library: ZlibLibrary, _ direction: Direction) throws(CompressionError) {
        let stream = UnsafeMutableRawPointer.allocate(byteCount: Field.byteCount, alignment: 8)
        unsafe stream.initializeMemory(as: UInt8.self, repeating: 0, count: Field.byteCount)
        let status =
            switch direction {
            case .compress(let level): unsafe library.deflateInit(stream, CInt(level), "1", CInt(Field.byteCount))
            case .decompress: unsafe library.inflateInit(stream, "1", CInt(Field.byteCount))
            }
        guard status == Code.ok else {
            unsafe stream.deallocate()
            throw .failed(.zlib, operation: "starting", reason: Self.words(status))
        }
        self.library = library
        self.direction = direction
        unsafe self.stream = stream
    }

    deinit {
        _ = unsafe direction == .decompress ? library.inflateEnd(stream) : library.deflateEnd(stream)
        unsafe stream.deallocate()
    }

    func run(
        _ source: UnsafeRawBufferPointer, into room: UnsafeMutableRawBufferPointer, flush: Bool
    ) throws(CompressionError) -> StreamStep {
        let (sourceBytes, roomBytes) = (UInt32(clamping: source.count), UInt32(clamping: room.count))
        // SAFETY: the fields lie inside the allocation; zlib keeps to the counts, and keeps no pointer that it uses later.
        unsafe stream.storeBytes(of: source.baseAddress, toByteOffset: Field.nextIn, as: UnsafeRawPointer?.self)
        unsafe stream.storeBytes(of: sourceBytes, toByteOffset: Field.availableIn, as: UInt32.self)
        unsafe stream.storeBytes(of: room.baseAddress, toByteOffset: Field.nextOut, as: UnsafeMutableRawPointer?.self)
        unsafe stream.storeBytes(of: roomBytes, toByteOffset: Field.availableOut, as: UInt32.self)
        let mode = flush || direction == .decompress ? Self.syncFlush : 0
        let status = unsafe direction == .decompress ? library.inflate(stream, mode) : library.deflate(stream, mode)
        let leftIn = unsafe stream.load(fromByteOffset: Field.availableIn, as: UInt32.self)
        let leftOut = unsafe stream.load(fromByteOffset: Field.availableOut, as: UInt32.self)
        switch status {
        case Code.ok, Code.noProgress: break
        case Code.streamEnd: throw .damaged(.zlib, reason: "their stream ends before the migration does")
        case Code.dictionary: throw .damaged(.zlib, reason: "they ask for a dictionary")
        default:
            let reason = message ?? Self.words(status)
            throw direction == .decompress
                ? .damaged(.zlib, reason: reason) : .failed(.zlib, operation: "compressing", reason: reason)
        }
        return StreamStep(
            taken: Int(sourceBytes - leftIn), put: Int(roomBytes - leftOut), isFlushed: leftIn == 0 && leftOut > 0)
    }

    func reset() throws(CompressionError) {
        let status = unsafe direction == .decompress ? library.inflateReset(stream) : library.deflateReset(stream)
        guard status == Code.ok else { throw .failed(.zlib, operation: "starting again", reason: Self.words(status)) }
    }

    /// What zlib says itself, a static text of it.
    private var message: String? {
        unsafe stream.load(fromByteOffset: Field.message, as: UnsafePointer<CChar>?.self).map {
            unsafe String(cString: $0)
        }
    }

    private static func words(_ status: CInt) -> String {
        switch status {
        case -4: "out of memory"
        case -6: "this version of zlib is not the one expected"
        default: "status \(status)"
        }
    }
}
